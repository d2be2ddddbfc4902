//! Policies, associations and routes come and go: no packet is fast that the rule keeps in the kernel, and
//! none passes that it lets go.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fastswan::compiler::fuzz(bytes));
