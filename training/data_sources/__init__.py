"""Where images come from: files and archives, published data sets, arrays, drawn scenes. No torch in here."""
