"""Benchmarks of real transfers: two processes a system, on this machine, optionally beside real NIXL.

Run them as ``asyncxfer bench``. The package uses the public API only, as any program would, so what it measures is what
a caller gets. Top down: ``_cli`` (options), ``_compare``, ``_loop`` and ``_notify`` (what is run, in which order),
``_place`` (on loopback or in two network namespaces), ``_pair`` (the two processes of one system as seen from here),
``_worker`` and ``_side`` (what runs in them), ``_ours`` and ``_nixl`` (the two systems), ``_stream`` and ``_iperf``
(plain streams beside them), ``_ticker`` (how late the loop is), ``_shapes`` and ``_pattern`` (which bytes), ``_report``
(the tables).
"""
