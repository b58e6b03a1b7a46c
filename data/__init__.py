"""Clip stores, and what is read from them: tables, data sets, samplers, targets."""
