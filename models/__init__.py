"""The YOLOv5 network family, built from model YAMLs."""
