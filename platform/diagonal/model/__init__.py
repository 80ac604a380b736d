"""The network: causal forward over diffusers' Wan modules, K/V cache, text, VAE, weights."""
