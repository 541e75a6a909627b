"""Every size of attention and of norms against PyTorch: where is a call lost?"""
