from .loop import *
from .loop import ALL, CPU_CELLS, NOTHING, STATES, check_batch, compute_dtype, layer_backward, layer_forward
