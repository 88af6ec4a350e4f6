"""A world of people at work: 1,080 pictures with known attributes, biased on purpose, and what reads and draws them."""
