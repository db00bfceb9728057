"""sLSTM, the scalar-memory LSTM of xLSTM.

The formula is that of Beck et al. 2024, arXiv:2405.04517, equations 8 to 17:

    i~, f~, z~, o~ = wx + rh,  m' = max(i~, log sigmoid(f~) + m),
    i = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m'),
    c' = f * c + i * tanh(z~),  n' = f * n + i,  h' = sigmoid(o~) * c' / n'

Of the paper's two forget gates this is the sigmoid, as in FlashRNN. m only keeps exp in range: the
cell stores c exp(m) and n exp(m), and h does not depend on m. An empty state, n = 0, has nothing to
rescale, so there m' is i~; then n' = 1, and from then on n' >= 1.
"""

from .cell import Cell
from .functions import exp, log_sigmoid, maximum, sigmoid, tanh, where, zeros_like


def slstm_scales(lead, is_empty):
    """Compute i and f from `lead`, i~ minus (log sigmoid(f~) + m)."""
    behind = 0.0 - lead
    i = exp(where(is_empty | (lead > 0.0), 0.0, lead))
    # Above 1 only where n = 0; it is limited, because 0 times infinity would be NaN there.
    f = exp(where(is_empty | (lead > 0.0), where(behind > 80.0, 80.0, behind), 0.0))
    return i, f


def slstm_forward(wx, rh, state, extra):
    _, c, n, m = state
    i, f = wx[0] + rh[0], wx[1] + rh[1]
    z, o = tanh(wx[2] + rh[2]), sigmoid(wx[3] + rh[3])
    kept = log_sigmoid(f) + m
    lead, is_empty = i - kept, n == 0.0
    m = where(is_empty, i, maximum(i, kept))
    new, old = slstm_scales(lead, is_empty)
    c, n = old * c + new * z, old * n + new
    return (o * c / n, c, n, m), (lead, sigmoid(0.0 - f), z, o)


def slstm_backward(saved, state, previous, d_state, extra):
    lead, forgotten, z, o = saved
    dh, dc, dn, dm = d_state
    is_empty = previous[2] == 0.0
    new, old = slstm_scales(lead, is_empty)
    n = where(state[2] == 0.0, 1.0, state[2])  # after a step n is 0 only in padding
    mean, share = state[1] / n, dh * o / n
    dc, dn = dc + share, dn - share * mean
    d_new = (dc * z + dn) * new
    d_old = (dc * previous[1] + dn * previous[2]) * old
    d_lead = where(is_empty | (lead > 0.0), 0.0 - d_old, d_new)
    # A maximum of two equal values passes half the gradient to each.
    share_of_i = where(is_empty | (lead > 0.0), 1.0, where(lead < 0.0, 0.0, 0.5))
    d_kept = (1.0 - share_of_i) * dm - d_lead
    d_rh = (
        share_of_i * dm + d_lead,
        d_kept * forgotten,
        dc * new * (1.0 - z * z),
        dh * mean * o * (1.0 - o),
    )
    return d_rh, (), (zeros_like(dh), dc * old, dn * old, d_kept)


SLSTM = Cell(
    "slstm",
    ("i", "f", "z", "o"),
    ("h", "c", "n", "m"),
    slstm_forward,
    slstm_backward,
    n_saved=4,
)
