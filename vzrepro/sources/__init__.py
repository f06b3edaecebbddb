"""Where bytes come from: mirrors and downloads, Debian's archive, crates, and images made of packages."""
