"""Engine programs: `nn.Module`s whose forward has exactly the signature of the engine that is made of them."""
