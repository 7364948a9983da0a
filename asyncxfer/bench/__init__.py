"""Benchmarks of real transfers: two processes a system, on this machine, optionally beside real NIXL.

Run them as ``asyncxfer bench``. The package uses the public API only, as any program would, so what it measures is what
a caller gets. Top down: ``_cli`` (options), ``_compare`` and ``_loop`` (what is run, in which order), ``_pair``
(the two processes of one system as seen from here), ``_worker`` and ``_side`` (what runs in them), ``_ours`` and
``_nixl`` (the two systems), ``_ticker`` (how late the loop is), ``_shapes`` and ``_pattern`` (which bytes), ``_report``
(the tables).
"""
