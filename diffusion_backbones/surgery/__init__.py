"""What is done to, or asked of, a stock network of any family: folding, introspection, trainable parts, compilation,
memory.
"""
