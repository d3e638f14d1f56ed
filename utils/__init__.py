"""What a detector needs around its network: data, loss, metrics, files. Imports neither ``models`` nor ``quant``."""
