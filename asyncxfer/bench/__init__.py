"""Benchmarks of real transfers: two processes a system, on this machine, optionally beside real NIXL.

Run them as ``asyncxfer bench``. The package uses the public API only, as any program would, so
what it measures is what a caller gets. A run is read from the top down: ``_cli`` (options),
``_compare``, ``_stall`` and ``_in_flight`` (what is run and in which order), ``_pair`` (the two
processes of one system as seen from here), ``_worker`` and ``_side`` (what runs in them),
``_ours`` and ``_nixl`` (the two systems), ``_shapes`` and ``_pattern`` (which bytes), ``_report``
(the tables).
"""
