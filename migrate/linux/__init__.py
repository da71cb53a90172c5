"""System calls and ioctls by the kernel's own names (layer 1).

Thin: a structure, its number, a call. Policy (what is tracked, what is sent) lives above. Features
are probed by using them; where the kernel lacks one the binding raises `FeatureMissing`.
"""
