"""Whether a hospital's data is fit for a study, before it joins. The report stays at the site."""
