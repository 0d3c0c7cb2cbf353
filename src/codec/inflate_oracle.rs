//! A slow and simple inflater (RFC 1951) that tells how far back a stream
//! reaches: the libraries at hand do not refuse a stream that reaches farther
//! than the window they were asked for.

/// The data, and the largest distance of a match in it.
pub(super) fn inflate(packed: &[u8]) -> (Vec<u8>, usize) {
    let mut bits = Bits { packed, at: 0 };
    let (mut out, mut farthest) = (Vec::new(), 0);
    loop {
        let last = bits.take(1) == 1;
        match bits.take(2) {
            0 => {
                bits.at = bits.at.next_multiple_of(8);
                let len = bits.take(16);
                bits.take(16);
                for _ in 0..len {
                    out.push(bits.take(8) as u8);
                }
            }
            kind => {
                let (literals, distances) = if kind == 1 {
                    fixed()
                } else {
                    dynamic(&mut bits)
                };
                block(&mut bits, &literals, &distances, &mut out, &mut farthest);
            }
        }
        if last {
            return (out, farthest);
        }
    }
}

fn block(
    bits: &mut Bits<'_>,
    literals: &Code,
    distances: &Code,
    out: &mut Vec<u8>,
    farthest: &mut usize,
) {
    loop {
        match literals.read(bits) {
            literal @ 0..=255 => out.push(literal as u8),
            256 => return,
            symbol => {
                // Lengths: 8 symbols without extra bits, then 4 for each
                // number of them; distances: 4, then 2.
                let len = 3 + match symbol - 257 {
                    28 => 255,
                    n @ 0..8 => n,
                    n => ((4 + n % 4) << (n / 4 - 1)) + bits.take(n as u32 / 4 - 1),
                };
                let distance = 1 + match distances.read(bits) {
                    n @ 0..4 => n,
                    n => ((2 + n % 2) << (n / 2 - 1)) + bits.take(n as u32 / 2 - 1),
                };
                *farthest = distance.max(*farthest);
                for _ in 0..len {
                    out.push(out[out.len() - distance]);
                }
            }
        }
    }
}

struct Bits<'a> {
    packed: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: u32) -> usize {
        (0..count).fold(0, |value, bit| {
            let one = self.packed[self.at / 8] >> (self.at % 8) & 1;
            self.at += 1;
            value | usize::from(one) << bit
        })
    }
}

/// A canonical Huffman code: of each length of code word, the symbols that
/// have one, in order.
struct Code([Vec<usize>; 16]);

impl Code {
    fn new(lengths: &[usize]) -> Self {
        let mut code = Self(Default::default());
        for (symbol, &len) in lengths.iter().enumerate() {
            code.0[len].push(symbol);
        }
        code
    }

    fn read(&self, bits: &mut Bits<'_>) -> usize {
        let (mut word, mut first) = (0, 0);
        for symbols in &self.0[1..] {
            word = word << 1 | bits.take(1);
            if word < first + symbols.len() {
                return symbols[word - first];
            }
            first = (first + symbols.len()) << 1;
        }
        panic!("no such code word");
    }
}

fn fixed() -> (Code, Code) {
    let literals = [[8; 144].as_slice(), &[9; 112], &[7; 24], &[8; 8]].concat();
    (Code::new(&literals), Code::new(&[5; 30]))
}

fn dynamic(bits: &mut Bits<'_>) -> (Code, Code) {
    let literals = 257 + bits.take(5);
    let distances = 1 + bits.take(5);
    let mut lengths = vec![0; 19];
    let order = [
        16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
    ];
    for &symbol in &order[..4 + bits.take(4)] {
        lengths[symbol] = bits.take(3);
    }
    let code = Code::new(&lengths);
    let mut lengths = Vec::new();
    while lengths.len() < literals + distances {
        let (value, times) = match code.read(bits) {
            16 => (*lengths.last().unwrap(), 3 + bits.take(2)),
            17 => (0, 3 + bits.take(3)),
            18 => (0, 11 + bits.take(7)),
            len => (len, 1),
        };
        lengths.extend(std::iter::repeat_n(value, times));
    }
    let distances = lengths.split_off(literals);
    (Code::new(&lengths), Code::new(&distances))
}
