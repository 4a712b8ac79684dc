//! The same tests on this machine's GPU (`make test-gpu`): ignored unless asked for, as most machines have none.

use super::device::on_the_gpu;
use super::{attention, kernels, products, sampler};

#[test]
#[ignore = "needs a GPU"]
fn gpu_kernels_give_what_their_formulas_say() {
    on_the_gpu(&[
        kernels::embeddings_are_rows_of_the_table_and_angles_those_of_positions,
        kernels::norms_are_those_of_the_rows_named,
        products::products_of_few_rows_are_sums_of_products,
        products::products_of_many_rows_are_sums_of_products,
        products::weights_of_one_byte_are_multiplied_by_the_scale_of_their_row,
        products::every_number_of_one_byte_becomes_the_same_number_of_two,
        products::where_the_vendors_library_multiplies_gates_and_ups_become_activations_afterwards,
        attention::queries_keys_and_values_are_turned_and_stored_where_their_position_is,
        attention::attention_of_one_token_each_is_the_softmax_over_its_own_blocks,
        attention::attention_of_many_tokens_is_the_softmax_over_all_before_each,
        sampler::tokens_are_drawn_by_the_hosts_rules_and_told_with_their_log_probabilities,
        sampler::where_no_logit_is_a_number_the_first_token_comes_with_a_finite_log_probability,
    ]);
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_numbers_are_the_cpus_and_the_contract_is_kept() {
    on_the_gpu(&[
        super::the_numbers_are_the_cpus_however_a_sequence_is_computed,
        super::a_cuda_back_end_keeps_the_contract,
    ]);
}
