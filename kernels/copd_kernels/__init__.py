"""Operations whose speed or memory decides a step, each in a folder of its own.

A folder's ``__init__`` states the contract (shapes, FLOPs, bytes, limits) and ``reference`` defines the
operation in plain torch. Any faster form must agree with that reference; the stack above calls the
operation by its contract and never depends on a form.
"""
