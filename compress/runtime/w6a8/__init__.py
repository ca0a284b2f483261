"""Linear layers with 6-bit weights and 8-bit inputs.

``reference`` says what is computed, ``tiles`` how a kernel wants the codes, ``build``
and ``abi`` make and open the kernels of ``runtime/csrc``, ``ops`` and ``linear``
put them in a model.
"""
