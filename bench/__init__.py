"""Benchmark of fastrnn against torch.nn and others: ``fastrnn bench``.

``registry`` defines the cases and ``providers`` the implementations; ``measure`` checks and times a
case, ``limits`` measures what the device can do; ``results`` holds and stores the rows, ``report``,
``plots`` (with ``heatmap`` and ``drawing``), ``page`` and ``readme`` present them, and ``cli`` ties
them together.
"""
