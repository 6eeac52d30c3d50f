"""Fused ops: each validates its arguments, calls its kernel and is registered with torch.library."""
