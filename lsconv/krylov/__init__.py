"""How min ||Ax - y|| is iterated: knows LinearOperator, no convolution."""
