"""The backends that ship with asyncxfer. They are found by name, through entry points; nothing here imports them."""
