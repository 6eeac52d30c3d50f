"""Fused ops: each validates its arguments, calls its kernel and registers with torch.library."""
