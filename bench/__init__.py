"""Benchmark of fastrnn against torch.nn: ``fastrnn bench``.

``registry`` says what is measured, ``measure`` checks and times one case, ``results`` holds
and stores the rows, ``report``, ``plots`` and ``page`` show them, ``cli`` joins them.
"""
