"""Files of weights that anybody may have written: read without running anything of them."""
