"""Triton kernels, imported as ``fastrnn.kernels``.

A cell comes from ``fastrnn.cells``, where it is written once for all engines;
``activations.py`` binds it to Triton together with the functions it calls. A schedule consists of
one forward and one backward loop through time, neither of which is specific to a cell:

``persistent.py``
    The recurrent weights stay on chip for the whole sequence, distributed over a group of programs
    that exchange h every step. Written in Gluon, Triton's language with explicit layouts.
``resident.py``
    The recurrent weights stay in a single program, for small hidden sizes.
``stepwise.py``
    One launch per step.
``staged.py``, ``staged_products.py``
    Several launches per step, where a step is more than one product followed by arithmetic on each
    hidden unit separately: normalized cells, late products, projections; also for float64.
``staged_resident.py``
    The same cells in one launch, for small hidden sizes: their version of schedule ``resident``.

``words.py`` implements how the programs of a group wait for each other, and ``fragments.py`` the
layouts of their products' operands; ``tiles.py`` holds the building blocks of the other two
schedules. ``configs.py`` chooses the schedule and tiles from simulated step times, ``steps.csv``;
``launch.py`` and ``launch_staged.py`` allocate and launch.

This folder imports only ``cells`` from the package, which imports nothing, and only the two
launchers import torch. Kernels can therefore be read, interpreted, compiled and planned without it.

Capitals are compile-time constants: CELL is the cell, H the hidden size, and BLOCK_B and BLOCK_H
the batch rows and hidden units of a tile. T steps, B batch rows, D directions and G gates are known
at run time or from shapes. ``unit0`` is the first hidden unit of a program; ``row`` its batch rows
and ``rows`` the same rows at a step, in the flattened (T, B).
"""
