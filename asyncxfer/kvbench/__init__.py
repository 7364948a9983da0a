"""What the KV cache of a model comes to, and how long it takes to move: ``asyncxfer kvbench``.

It uses the public API, the store and the benchmarks of transfers only. Top down: ``_cli`` (the subcommands),
``_kvcache``, ``_plan``, ``_profile``, ``_traffic`` and ``_trace`` (one subcommand each), ``_pattern``, ``_ranks`` and
``_rank`` (a description of traffic, the processes that it goes between as seen from here, what runs in them),
``_requests`` and ``_replay`` (a trace of requests, the store that they go to), ``_sizes`` (what each rank keeps),
``_shipped`` and ``_config`` (a ``config.json`` read into layers) by ``_attention`` and ``_states`` (the rules of each
family), ``_fields`` (its entries, checked), ``_layers`` (what one layer keeps).
"""
