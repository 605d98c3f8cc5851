"""Linear operators between tensors, each with its exact adjoint.

``base`` has the interface: shapes of one item, application, the adjoint, the checks. The operators are ``convolution``
with its two backends ``direct_convolution`` and ``fft_convolution``, ``padding``, ``difference``, those that are no
convolutions in ``elementary``, and those made of others in ``algebra``; ``linear_function`` makes them of torch's
modules and functions, ``scipy`` converts to and from SciPy.

Below them: ``arguments`` checks what torch's signature allows, ``modules`` reads it off torch's modules, ``checks`` the
tensors that meet an operator; ``batch_layout`` lays out operators with parameters per item, ``transforms`` keeps
torch.compile out of solves.
"""
