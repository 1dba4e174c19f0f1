"""Private names of torch 2.14 and torchtitan 0.3.0, and corrections of their errors.

Newer versions make files here deletable.
"""
