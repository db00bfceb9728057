"""Benchmark of fastrnn against torch.nn and others: ``fastrnn bench``.

``registry`` says what is measured and ``providers`` who; ``measure`` checks and times one case,
``limits`` what the device can do; ``results`` holds and stores the rows, ``report``, ``plots`` and
``page`` show them, ``cli`` joins them.
"""
