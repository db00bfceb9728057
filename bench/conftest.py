"""``pytest bench`` runs the speed tests alone; the other files are parts of ``fastrnn.bench``."""

collect_ignore_glob = ["[!t]*.py"]
