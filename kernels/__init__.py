"""Triton kernels, imported as ``fastrnn.kernels``.

A cell comes from ``fastrnn.cells``, where it is written once for every engine;
``activations.py`` gives it to Triton, with the functions that it calls. A schedule is one forward
and one backward loop through time that knows no cell by name:

``persistent.py``
    The recurrent weights stay on chip for the whole sequence, spread over a group of programs that
    exchange h every step; in Gluon, Triton's language of explicit layouts.
``resident.py``
    They stay in one program, for small hidden sizes.
``stepwise.py``
    One launch for each step.
``staged.py``, ``staged_products.py``
    Several launches for each step, where it is more than one product and arithmetic on each hidden
    unit by itself: normalised cells, late products, projections; and for float64.
``staged_resident.py``
    Such cells in one launch, for small hidden sizes, which is the schedule ``resident`` of theirs.

``words.py`` is how the programs of a group wait for each other and ``fragments.py`` where the
operands of their products lie; ``tiles.py`` is what the other two schedules are made of.
``configs.py`` chooses schedule and tiles by simulated times of a step, ``steps.csv``, and
``launch.py`` and ``launch_staged.py`` allocate and launch.

Of the package only ``cells`` is imported here, which imports nothing; these two alone import
torch, so that kernels can be read, interpreted and compiled, and plans be made, without it.

Capitals are compile-time constants: CELL the cell, H hidden units, BLOCK_B rows of the batch and
BLOCK_H hidden units of a tile. T steps, B rows of the batch, D directions, G gates are known at
run time or from shapes. ``unit0`` is the first hidden unit of a program; ``row`` its rows of the
batch and ``rows`` the same rows at a step, in the flattened (T, B).
"""
