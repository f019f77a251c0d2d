"""The questions of Zhou et al. 2018 asked again: what ``make paper`` runs."""
