"""What a user asks for: the (pseudo-)inverse of a convolution."""
