"""Parts of training that know no trainer: noise, sampling, prefix sharing, value heads, dropout, precision."""
