"""Distillation: a slow teacher's judgement in a fast student."""
