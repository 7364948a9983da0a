"""Nothing of it is for Python."""

__pyx_capi__: dict[str, object]  # what other Cython modules link to
