"""What the structure of convolution buys: symbols, block-circulant operators, the border method."""
