"""The recipes that come with kvshare, as YAML files; `kvshare.recipe` reads them."""
