"""Linear operators between tensors, each with its exact adjoint.

``base`` has the interface: shapes of one item, application, the adjoint, the checks. The operators are ``convolution``
with its two backends ``direct_convolution`` and ``fft_convolution``, ``padding``, ``difference``, those that are no
convolutions in ``elementary``, and those made of others in ``algebra``; ``linear_function`` makes them of torch's
modules and functions, ``scipy`` converts to and from SciPy.

They use: ``arguments``, which checks the arguments of torch's convolution, and ``modules``, which takes them from
torch's modules; ``checks`` and ``dtypes`` of tensors and operators; ``batch_layout`` for operators with parameters per
item; ``windows`` and ``observed``; ``memory``; and ``transforms``, which keeps torch.compile out of solves.
"""
