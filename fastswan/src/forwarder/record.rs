//! Where the kernel notes that a frame lies in several buffers, so that the program can read it.
//!
//! A helper tells how long a frame is with all of its buffers, but a call of one costs more than any other check. The kernel's
//! own record of a frame (`xdp_buff`) has a flag for it. A program gets at the record by the kernel's function
//! `bpf_cast_to_kern_ctx` (Linux 6.2), which the verifier replaces by nothing; the function's number and where the flags lie, the
//! kernel's description of its types tells (BTF). Where it does not, the program calls the helper.
//!
//! The libraries that load programs read that description for relocations that only C compilers write, and do not know calls of the
//! kernel's functions.

use std::{fs, sync::OnceLock};

use fastswan_ebpf::{CAST_MARKER, SEVERAL_BUFFERS};

const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// Types that are told by others are followed so far.
const MOST_NESTED: u32 = 8;

/// What the program needs to know of the kernel's record of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The number of `bpf_cast_to_kern_ctx` among the kernel's types.
    cast: u32,
    /// Where the flags lie in it, in bytes; not 0.
    pub(super) flags: u32,
}

impl Record {
    /// That of the running kernel, if it tells.
    pub(super) fn of_kernel() -> Option<Self> {
        static RECORD: OnceLock<Option<Record>> = OnceLock::new();
        *RECORD.get_or_init(|| Self::of(&Types::new(&fs::read(TYPES).ok()?)?))
    }

    fn of(types: &Types<'_>) -> Option<Self> {
        let (cast, _) = types.find(Kind::FUNCTION, "bpf_cast_to_kern_ctx")?;
        let (_, bits) = types.find(Kind::ENUM, "xdp_buff_flags")?;
        let bit = bits.members(8).find(|bit| types.name(bit[0]) == Some(b"XDP_FLAGS_HAS_FRAGS"))?;
        let (_, record) = types.find(Kind::STRUCT, "xdp_buff")?;
        let (bits, of_type) = types.member(record, "flags", MOST_NESTED)?;
        let is_word = types.size_of_number(of_type) == Some(4);
        // Where members may be less than bytes, the upper bits say how long this one is, if it is.
        let is_known = bit[1] == SEVERAL_BUFFERS && is_word && bits > 0 && bits % 32 == 0 && bits < 1 << 24;
        is_known.then_some(Self { cast, flags: bits / 8 })
    }

    /// The object with calls of the function where it marks them. It lies where objects must, from the index on.
    pub(super) fn write_calls(&self, object: &[u8]) -> (Vec<u8>, usize) {
        const ALIGNMENT: usize = 8;
        let mut written = vec![0; object.len() + ALIGNMENT];
        let start = written.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let (marked, call) = (instruction(CALL, CAST_MARKER), instruction(CALL_OF_KERNEL, self.cast));
        let (chunks, rest) = object.as_chunks::<8>();
        for (chunk, to) in chunks.iter().zip(written[start..].chunks_exact_mut(8)) {
            to.copy_from_slice(if *chunk == marked { &call } else { chunk });
        }
        let end = start + object.len();
        written[end - rest.len()..end].copy_from_slice(rest);
        written.truncate(end);
        (written, start)
    }
}

/// Source registers of calls: of helpers, and of the kernel's functions (`BPF_PSEUDO_KFUNC_CALL`).
const CALL: u8 = 0;
const CALL_OF_KERNEL: u8 = 2;

/// A call as it lies in an object: `BPF_JMP | BPF_CALL`, registers, nothing, the immediate.
fn instruction(source: u8, immediate: u32) -> [u8; 8] {
    let registers = if cfg!(target_endian = "big") { source } else { source << 4 };
    let [a, b, c, d] = immediate.to_ne_bytes();
    [0x85, registers, 0, 0, a, b, c, d]
}

/// The kernel's description of its types: a header, types one after the other, and their names. Numbers have 32 bits.
struct Types<'a> {
    /// By number, less one.
    all: Vec<Type<'a>>,
    names: &'a [u8],
}

/// A type.
#[derive(Clone, Copy)]
struct Type<'a> {
    kind: Kind,
    name: u32,
    /// Of a number, in bytes; or the type that this one is another name for.
    about: u32,
    /// What is told of its members, or of itself.
    rest: &'a [u8],
}

/// A kind of types.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind(u32);

impl Kind {
    const NUMBER: Self = Self(1);
    const STRUCT: Self = Self(4);
    const UNION: Self = Self(5);
    const ENUM: Self = Self(6);
    const TYPEDEF: Self = Self(8);
    const FUNCTION: Self = Self(12);

    /// Bytes that follow a type of this kind with so many members; `None` if there is no such kind.
    fn rest(self, members: usize) -> Option<usize> {
        Some(match self.0 {
            // Pointers, declarations, other names, qualifiers, functions, floating point numbers and tags of types.
            2 | 7..=12 | 16 | 18 => 0,
            // Numbers, variables and tags of declarations.
            1 | 14 | 17 => 4,
            // Arrays.
            3 => 12,
            // Structures, unions, sections, and enumerations with values of 64 bits.
            4 | 5 | 15 | 19 => members * 12,
            // Enumerations and parameters.
            6 | 13 => members * 8,
            _ => return None,
        })
    }
}

impl<'a> Types<'a> {
    /// `None` if it is not one, or one of the other byte order.
    fn new(description: &'a [u8]) -> Option<Self> {
        const MAGIC: u16 = 0xeb9f;
        let (magic, _) = description.split_first_chunk()?;
        if u16::from_ne_bytes(*magic) != MAGIC {
            return None;
        }
        let field = |index: usize| number(description.get(index..)?);
        let part = |offset: u32, length: u32| {
            let start = field(4)?.checked_add(offset)? as usize;
            description.get(start..start.checked_add(length as usize)?)
        };
        let mut left = part(field(8)?, field(12)?)?;
        let mut all = Vec::new();
        while !left.is_empty() {
            let (head, behind) = left.split_at_checked(12)?;
            let (name, info, about) = (number(head)?, number(&head[4..])?, number(&head[8..])?);
            let kind = Kind(info >> 24 & 0x1f);
            let (rest, behind) = behind.split_at_checked(kind.rest((info & 0xffff) as usize)?)?;
            all.push(Type { kind, name, about, rest });
            left = behind;
        }
        Some(Self { all, names: part(field(16)?, field(20)?)? })
    }

    fn with_number(&self, number: u32) -> Option<Type<'a>> {
        self.all.get(number.checked_sub(1)? as usize).copied()
    }

    /// A type, and its number.
    fn find(&self, kind: Kind, name: &str) -> Option<(u32, Type<'a>)> {
        let mut all = (1..).zip(&self.all);
        let is_it = |found: &Type<'_>| found.kind == kind && self.name(found.name) == Some(name.as_bytes());
        all.find(|(_, found)| is_it(found)).map(|(number, found)| (number, *found))
    }

    /// Where a member of a structure lies, in bits, and its type. It may lie in others without names, so deep at most.
    fn member(&self, of: Type<'a>, name: &str, depth: u32) -> Option<(u32, u32)> {
        of.members(12).find_map(|member| {
            let [found, of_type, bits] = member[..] else { return None };
            let found = self.name(found)?;
            if found == name.as_bytes() {
                return Some((bits, of_type));
            }
            let inner = self.with_number(of_type).filter(|inner| {
                found.is_empty() && depth > 0 && matches!(inner.kind, Kind::STRUCT | Kind::UNION)
            })?;
            let (inside, of_type) = self.member(inner, name, depth - 1)?;
            Some((bits.checked_add(inside)?, of_type))
        })
    }

    /// The size of a type that is a number, or another name for one, in bytes.
    fn size_of_number(&self, number: u32) -> Option<u32> {
        let mut found = self.with_number(number)?;
        for _ in 0..MOST_NESTED {
            if found.kind != Kind::TYPEDEF {
                break;
            }
            found = self.with_number(found.about)?;
        }
        (found.kind == Kind::NUMBER).then_some(found.about)
    }

    fn name(&self, offset: u32) -> Option<&'a [u8]> {
        let name = self.names.get(offset as usize..)?;
        name.split(|byte| *byte == 0).next()
    }
}

impl Type<'_> {
    /// Its members, of so many bytes each, as numbers.
    fn members(&self, length: usize) -> impl Iterator<Item = Vec<u32>> {
        let members = self.rest.chunks_exact(length);
        members.map(|member| member.chunks_exact(4).filter_map(number).collect())
    }
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A description that is put together type by type.
    #[derive(Default)]
    struct Description {
        types: Vec<u32>,
        names: Vec<u8>,
    }

    impl Description {
        fn name(&mut self, name: &str) -> u32 {
            let offset = u32::try_from(self.names.len()).unwrap();
            self.names.extend(name.bytes().chain([0]));
            offset
        }

        fn add(&mut self, kind: Kind, name: &str, about: u32, rest: &[(&str, &[u32])]) {
            let members = u32::try_from(rest.len()).unwrap();
            let name = self.name(name);
            self.types.extend([name, kind.0 << 24 | members, about]);
            for (name, numbers) in rest {
                let name = self.name(name);
                self.types.push(name);
                self.types.extend(*numbers);
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let types = u32::try_from(self.types.len() * 4).unwrap();
            let names = u32::try_from(self.names.len()).unwrap();
            let mut bytes = 0xeb9f_u16.to_ne_bytes().to_vec();
            bytes.extend([1, 0]);
            let header = [24, 0, types, types, names];
            bytes.extend(header.iter().chain(&self.types).flat_map(|number| number.to_ne_bytes()));
            bytes.extend(&self.names);
            bytes
        }
    }

    /// What kernels tell, with the flags so many bits behind the record's beginning, of a number of so many bytes.
    fn description(bits: u32, size: u32, flag: u32) -> Description {
        let mut description = Description::default();
        description.add(Kind(2), "", 1, &[]);
        description.add(Kind::NUMBER, "unsigned int", size, &[]);
        // What a number is told of besides is one of 32 bits.
        description.types.push(32);
        description.add(Kind::TYPEDEF, "u32", 2, &[]);
        description.add(Kind::ENUM, "xdp_buff_flags", 4, &[("XDP_FLAGS_HAS_FRAGS", &[flag])]);
        description.add(Kind::STRUCT, "xdp_buff", 56, &[("data", &[1, 0]), ("flags", &[3, bits])]);
        description.add(Kind::FUNCTION, "bpf_cast_to_kern_ctx", 1, &[]);
        description
    }

    fn read(description: &[u8]) -> Option<Record> {
        Record::of(&Types::new(description)?)
    }

    fn record(bits: u32, size: u32, flag: u32) -> Option<Record> {
        read(&description(bits, size, flag).bytes())
    }

    #[test]
    fn the_flags_are_where_the_kernel_says_or_are_not_read() {
        assert_eq!(record(52 * 8, 4, 1), Some(Record { cast: 6, flags: 52 }));
        assert_eq!(record(52 * 8, 8, 1), None, "another size");
        assert_eq!(record(52 * 8, 4, 2), None, "another bit");
        assert_eq!(record(52 * 8 + 1, 4, 1), None, "not on a word");
        assert_eq!(record((1 << 24) + 52 * 8, 4, 1), None, "a part of a word");
        assert_eq!(record(0, 4, 1), None, "0 stands for not known");
    }

    /// As Linux 6.18 has it.
    #[test]
    fn the_flags_may_lie_in_a_union_without_a_name() {
        let mut description = Description::default();
        description.add(Kind::NUMBER, "unsigned int", 4, &[]);
        description.types.push(32);
        description.add(Kind::ENUM, "xdp_buff_flags", 4, &[("XDP_FLAGS_HAS_FRAGS", &[1])]);
        description.add(Kind::STRUCT, "", 8, &[("frame_sz", &[1, 0]), ("flags", &[1, 32])]);
        description.add(Kind::UNION, "", 8, &[("", &[3, 0])]);
        description.add(Kind::STRUCT, "xdp_buff", 56, &[("txq", &[1, 320]), ("", &[4, 384])]);
        description.add(Kind::FUNCTION, "bpf_cast_to_kern_ctx", 1, &[]);
        assert_eq!(read(&description.bytes()), Some(Record { cast: 6, flags: 52 }));
    }

    #[test]
    fn a_description_that_ends_early_tells_nothing_and_does_no_harm() {
        let whole = description(52 * 8, 4, 1).bytes();
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]), None, "{end}");
        }
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] = !broken[at];
            read(&broken);
        }
    }

    #[test]
    fn only_marked_calls_are_written_anew() {
        let record = Record { cast: 0x0102_0304, flags: 52 };
        let other = instruction(CALL, CAST_MARKER + 1);
        let object = [[7; 8], instruction(CALL, CAST_MARKER), other].concat();
        let object = [&object[..], &[1, 2, 3]].concat();
        let (written, start) = record.write_calls(&object);
        assert_eq!(written[start..].as_ptr().align_offset(8), 0);
        let expected = [[7; 8], instruction(CALL_OF_KERNEL, 0x0102_0304), other].concat();
        assert_eq!(written[start..], [&expected[..], &[1, 2, 3]].concat());
    }
}
