//! Ranges that overlap, taken apart: so that each byte is looked at once,
//! with the number of ranges it is in.

/// Pieces of the union of `ranges` (start, end), in order, each with the
/// number of ranges that cover it.
pub(super) fn pieces(ranges: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut edges: Vec<(u64, bool)> = Vec::new();
    for (start, end) in ranges {
        if start < end {
            edges.extend([(start, true), (end, false)]);
        }
    }
    edges.sort_unstable();
    let mut pieces = Vec::new();
    let mut depth = 0;
    let mut from = 0;
    for (at, opens) in edges {
        if depth > 0 && at > from {
            pieces.push((from, at, depth));
        }
        from = at;
        if opens {
            depth += 1;
        } else {
            depth -= 1;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    #[test]
    fn overlapping_ranges_become_pieces() {
        let found = super::pieces([(10, 20), (15, 30), (15, 20), (40, 40), (30, 31)]);
        assert_eq!(found, [(10, 15, 1), (15, 20, 3), (20, 30, 1), (30, 31, 1)]);
        assert!(super::pieces([]).is_empty());
    }
}
