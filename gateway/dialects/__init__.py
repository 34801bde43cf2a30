"""API families: how their requests are read, how far their streams have come, how their errors look."""
