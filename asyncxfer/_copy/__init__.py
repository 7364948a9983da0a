"""``asyncxfer cp`` and ``asyncxfer ls``: files and objects by their URLs, through the public names of asyncxfer.

It imports no private module of asyncxfer but the checksums of its native core.
"""
