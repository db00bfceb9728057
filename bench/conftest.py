"""``pytest bench`` runs only the speed tests; the other files are modules of ``fastrnn.bench``."""

collect_ignore_glob = ["[!t]*.py"]
