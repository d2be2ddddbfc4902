//! Where the kernel has the index of a network device, by its BTF: compilers lay the structure out differently for each
//! kernel.

/// `linux/btf.h`
const MAGIC: u32 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// The offset of `ifindex` in `struct net_device`, in bytes, in the BTF of this machine's kernel.
pub(super) fn ifindex_offset(btf: &[u8]) -> Option<u32> {
    if u32::from(u16::from_ne_bytes(btf.get(..2)?.try_into().ok()?)) != MAGIC {
        return None;
    }
    let [header, types_at, types_length, strings_at] = [4, 8, 12, 16].map(|at| number(btf, at));
    let sections = btf.get(header? as usize..)?;
    let types = sections.get(types_at? as usize..)?.get(..types_length? as usize)?;
    let strings = sections.get(strings_at? as usize..)?;
    let is_named = |name: u32, wanted: &str| {
        let name = strings.get(name as usize..);
        name.and_then(|name| name.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    };
    let mut at = 0;
    while let (Some(name), Some(info)) = (number(types, at), number(types, at + 4)) {
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let after = at + 12;
        if kind == KIND_STRUCT && is_named(name, "net_device") {
            let member = (0..count).map(|member| after + 12 * member);
            let mut member =
                member.filter(|at| number(types, *at).is_some_and(|name| is_named(name, "ifindex")));
            let bits = number(types, member.next()? + 8)?;
            // With bit fields in the structure, the upper byte is a width.
            let bits = if info >> 31 == 1 { bits & 0x00ff_ffff } else { bits };
            return Some(bits / 8);
        }
        at = after
            + match kind {
                // Integers, variables, tags of declarations.
                1 | 14 | 17 => 4,
                // Arrays.
                3 => 12,
                // Structures, unions, sections of data, enumerations of 64 bits.
                4 | 5 | 15 | 19 => 12 * count,
                // Enumerations, parameters.
                6 | 13 => 8 * count,
                _ => 0,
            };
    }
    None
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF of a few types.
    fn btf(types: &[u32], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let length = u32::try_from(types.len()).unwrap();
        let mut btf = vec![0; 24];
        btf[..2].copy_from_slice(&0xeb9f_u16.to_ne_bytes());
        for (at, word) in [(4, 24), (8, 0), (12, length), (16, length)] {
            btf[at..at + 4].copy_from_slice(&u32::to_ne_bytes(word));
        }
        btf.extend(types);
        btf.extend(strings.as_bytes());
        btf
    }

    #[test]
    fn the_index_is_found_behind_other_types_and_beside_bit_fields() {
        // An integer, an enumeration of two, `net_device_ops`, and `net_device` with bit fields.
        let strings = "\0net_device_ops\0net_device\0ifindex\0mtu\0";
        let (ops, device, ifindex, mtu) = (1, 16, 27, 35);
        let types = [
            &[0, 1 << 24, 4, 32][..],
            &[0, 6 << 24 | 2, 4, 0, 0, 0, 1],
            &[ops, 4 << 24 | 1, 8, ifindex, 1, 64],
            &[device, 1 << 31 | 4 << 24 | 2, 400, mtu, 1, 32, ifindex, 1, (32 << 24) | (224 * 8)],
        ];
        let found = btf(&types.concat(), strings);
        assert_eq!(ifindex_offset(&found), Some(224));
        assert_eq!(ifindex_offset(&btf(&types[..3].concat(), strings)), None, "another structure's");
        for length in 0..found.len() {
            let _ = ifindex_offset(&found[..length]);
        }
    }
}
