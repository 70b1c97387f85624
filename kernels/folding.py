"""How a stem's picture is folded: 2x2 pixels are one, which a 4x4 filter of stride 1 reads."""

FOLDED = 16  # channels of a folded pixel: 2 x 2 pixels of up to 4 channels
MARGIN = (2, 1)  # folded pixels of zeros before and after: 4 taps reach from -2 to +1
TAPS = 4  # rows and columns of the folded filter
ROW = TAPS * FOLDED  # what a row of taps reads, in one piece
