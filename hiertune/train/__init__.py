"""One trial: loop, optimiser, checkpoint. Knows torch.distributed, but neither Ray nor MLflow.

Imports nothing: what passes between processes (`result.py`) must load without torch.
"""
