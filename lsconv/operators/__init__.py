"""What A is: linear operators between tensors, each with its exact adjoint."""
