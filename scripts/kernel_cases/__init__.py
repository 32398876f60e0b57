"""What ``kernel_report.py`` compiles: per group a table CASES, name to a call of the operator on CPU tensors."""
