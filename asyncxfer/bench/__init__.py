"""Benchmarks of real transfers: two processes a system, on this machine, optionally beside real NIXL.

Run them as ``asyncxfer bench``. The package uses the public API only, as any program would, so what it measures is what
a caller gets. Top down: ``_cli`` (options), ``_compare``, ``_loop``, ``_notify``, ``_post`` and ``_idle`` (what is run,
in which order), ``_place`` (on loopback or in two network namespaces), ``_pair`` (the two processes of one system as
seen from here), ``_worker`` and ``_side`` (what runs in them), ``_ours``, ``_crowd`` and ``_nixl`` (the two systems),
``_stream``, ``_iperf`` and ``_perftest`` (plain streams, and plain UCX, beside them), ``_ports`` (where those meet),
``_ucx`` (what everybody may use over UCX), ``_ticker`` (how late the loop is), ``_shapes`` and ``_pattern`` (which
bytes), ``_report`` (the tables).
"""
